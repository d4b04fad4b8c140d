"""What runs outside of the training process: local ranks, supervision, node health, SLURM."""
