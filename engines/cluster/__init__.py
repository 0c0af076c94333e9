"""Running on a Slurm cluster: submitting a job, and checking its nodes before they train.

* `submit.Request, command_of`: options of a job, and the sbatch command they make
* `submit.submit`: submit it
* `submit.plan_job`: what the job would do, without submitting it
* `preflight.check_nodes`: compare versions, GPUs, files, disks and clocks of all nodes
"""
