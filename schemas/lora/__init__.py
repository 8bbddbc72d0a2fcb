"""What can be known of a LoRA file without its weights: the header, the names, the shapes, the scaling."""
