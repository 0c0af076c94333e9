"""What every package shares and what imports nothing else of telltale.

Public names:
    `errors.UserError`: an error that the user can fix, with the argument it is about.
    `errors.one_line`, `errors.reason_of`, `errors.writing`: other errors in one line.
    `atomic.write_text`, `atomic.write_with`: a file is written completely or not at all.
    `csv_table.CsvTable`: strict reading of the tables that users bring.
    `locks.locked`: file locks for processes of one machine or several.
    `tasks.ArrayTask`, `tasks.parse_task`, `tasks.check_settings`: work shared by the tasks of a job array.
    `counter_rng.hash64`, `counter_rng.uniform`: random numbers as functions of integers.
    `progress.ProgressBar`: a bar on a terminal, lines in a log.
    `cores.available_cores`, `cores.worker_count`, `cores.cores_per_process`: the cores that may be used.
    `parent_process.die_with_parent`: child processes that end with their parent.
"""
