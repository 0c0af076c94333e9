"""What launch/train.py and launch/finetune_mlm.py share: `ranks`."""
