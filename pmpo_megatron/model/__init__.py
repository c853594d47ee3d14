"""The policy: a Megatron-Core model from a Hugging Face checkpoint, its log-probs and its optimizer step."""
