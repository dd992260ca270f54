# SPDX-License-Identifier: Apache-2.0
"""Requests of SGLang to the inputs of AGE-VLM: its own processor reads image and text, and its image token stays one token."""

from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput
from sglang.srt.models.mllama import MllamaForConditionalGeneration
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens

from .model import AgeVlmForConditionalGeneration


class AgeVlmProcessor(BaseMultimodalProcessor):
    # Mllama's name is the second architecture of the command line: it tells SGLang that there is an encoder.
    models = [AgeVlmForConditionalGeneration, MllamaForConditionalGeneration]

    def __init__(self, hf_config, server_args, _processor, *args, **kwargs):
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.mm_tokens = MultimodalSpecialTokens(
            image_token=_processor.image_token, image_token_id=_processor.image_token_id
        ).build(_processor)

    async def process_mm_data_async(self, image_data, input_text, *args, **kwargs):
        """
        Raises:
            ValueError: for several images, which SGLang's cross-attention, without a mask, cannot tell apart.
        """
        if len(image_data or []) > 1:
            raise ValueError(
                f"The request has {len(image_data)} images: in SGLang AGE-VLM takes one a request. Send one, or use `agevlm serve`."
            )
        loaded = await self.load_mm_data(prompt=input_text, image_data=image_data, multimodal_tokens=self.mm_tokens)
        items, input_ids, _ = await self.process_and_combine_mm_data_async(loaded, self.mm_tokens)
        return MultimodalProcessorOutput(
            mm_items=items, input_ids=input_ids.tolist(), im_token_id=self.mm_tokens.image_token_id
        )
