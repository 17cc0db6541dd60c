"""The sequential curriculum: stages, replay, training, forgetting."""
