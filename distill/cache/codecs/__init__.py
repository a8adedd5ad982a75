"""Codecs: how soft targets are encoded as bytes, one file per codec."""
