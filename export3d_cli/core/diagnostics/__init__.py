"""Diagnostics: is the installation complete (`doctor`), and how fast is it (`benchmark`).

Only `commands` may import this package; it imports `animation` and everything below it.
"""
