"""What the commands `train` and `finetune` have in common: `ranks` decides between launching and being a rank."""
