"""Bytes on disk: the safetensors container, read and written without keeping anything mapped."""
