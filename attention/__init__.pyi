from .image_tokens import ImageKeys as ImageKeys
from .image_tokens import image_tokens as image_tokens
from .maps import AttentionMaps as AttentionMaps
from .maps import attention_maps as attention_maps
