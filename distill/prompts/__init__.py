"""Prompts: examples as token ids and spans for a model. The only caller of a tokenizer."""
