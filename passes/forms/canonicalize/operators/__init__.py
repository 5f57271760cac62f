"""Operators that stand for several others: what each is made of, so that its parts can be seen and quantized."""
