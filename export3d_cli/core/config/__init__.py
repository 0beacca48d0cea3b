"""Configuration of models and training runs: frozen dataclasses, presets, cross-field rules, YAML.

- `schema`: the dataclasses and presets; their fields are the keys of a configuration file.
- `loading`: from YAML, weights headers and `key=value` overrides to a validated configuration, and back; rules
  between fields.

Every package of the core except `runtime` may import it. It imports only `runtime`, and no torch.
"""
