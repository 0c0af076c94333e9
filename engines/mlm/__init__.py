"""Finetuning of TinyLLaVA under DeepSpeed, and its evaluation on benchmarks of questions.

A run reads conversations, tokenizes each once, trains with Hugging Face's Trainer and writes
the merged model. A benchmark is answered greedily and scored against image-blind baselines.

Public names:
    finetune.run_finetuning: one run, from its configuration to RUN/model.
    dry_run.plan_finetuning: what a run would do, and the checks before its first step.
    prepare_data.open_datasets: the training and validation sets of a run.
    model.load_model_to_tune: the model with frozen parts and adapters.
    passes.Passes: how a step is dealt out to any number of processes.
    memory_estimate.estimate_memory, finetuning_memory_table: GPU memory before anything is loaded.
    vqa_benchmark.load_for_answers, answer_benchmark, score_answers, write_results: a benchmark.
    vqa_metrics.compute_vqa_metrics: metrics of answered items.
    vqa_wandb.send_answers: answers for Weights & Biases.
"""
