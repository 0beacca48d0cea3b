"""Diagnostics: is the installation complete (`doctor`), and how fast is it (`benchmark`, `cost_curves`).

`measurement` holds what both benchmarks share: GPU synchronisation and peak memory. Only `commands` may import this
package; it imports `animation` and everything below it.
"""
