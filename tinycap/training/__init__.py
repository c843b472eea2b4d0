"""What training needs besides the model: data, tokenizer, teacher, checkpoints, scenes. One subject a file."""
