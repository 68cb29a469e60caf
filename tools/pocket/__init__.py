"""How the pocket LFM2-MoE was made: data, tokenizer, training, evaluation and model card."""
