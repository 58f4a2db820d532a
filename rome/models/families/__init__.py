"""Model families: published presets, and configs of Hugging Face in both directions."""

from rome.models.families.hf_config import FAMILIES, Family, family_of, from_hf_config, to_hf_config
from rome.models.families.presets import PRESETS, preset

__all__ = ["FAMILIES", "PRESETS", "Family", "family_of", "from_hf_config", "preset", "to_hf_config"]
