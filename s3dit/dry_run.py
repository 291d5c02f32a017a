"""Run a plan's model call on torch's fake tensors, to learn what would be computed without computing it."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from s3dit.model.transformer import Transformer
from s3dit.plan import Plan
from s3dit.runtime.block_streaming import tensors
from s3dit.runtime.components import Components
from s3dit.runtime.encoders import PromptEmbeds


def dry_run(plan: Plan, components: Components) -> None:
    """Call text encoder and transformer once, as the plan would, without memory or arithmetic.

    `dispatch.record_calls` around it tells which Ops would be called with which shapes and dtypes.
    """
    placement, config = components.placement, components.config
    device, compute = placement.device, placement.compute
    texts = dict.fromkeys(text for caption in plan.captions for text in caption)
    lengths = [len(ids) for ids in texts if not isinstance(ids, PromptEmbeds)]
    layout = plan.layout(config.transformer, bool(plan.request.guidance_scale), device)
    encoder, transformer = (components.blank(part)[0] for part in ("text_encoder", "transformer"))
    assert isinstance(transformer, Transformer)
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        for owner, name, tensor in (*tensors(encoder), *tensors(transformer)):
            weight = isinstance(tensor, nn.Parameter)
            blank = torch.empty(tensor.shape, dtype=placement.dtype if weight else tensor.dtype)
            owner[name] = nn.Parameter(blank, requires_grad=False) if weight else blank
        if lengths:
            encoder(torch.empty(sum(lengths), config.text_encoder.hidden_size, dtype=compute), lengths)
        text = torch.empty(len(layout.text.token_index), config.transformer.cap_feat_dim, dtype=compute)
        x = torch.empty(len(layout.image.token_index), config.transformer.patch_dim, dtype=torch.float32)
        features: list[torch.Tensor] = []
        if layout.vision is not None and layout.clean is not None:
            width = config.transformer.siglip_feat_dim or 0
            features = [
                x.new_empty(len(layout.clean), x.shape[1]),
                text.new_empty(len(layout.vision.token_index), width),
            ]
        transformer(x, torch.zeros(1, dtype=torch.float32), transformer.context(layout, text, *features))
