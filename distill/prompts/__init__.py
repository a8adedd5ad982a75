"""Examples as token ids and spans, for one model. The one caller of a tokenizer."""
