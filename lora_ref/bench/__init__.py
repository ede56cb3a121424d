"""Paired timings: python -m lora_ref.bench."""
