"""`DecoderStage`: a Hugging Face decoder, or the layers of one pipeline stage of it, from token ids to the loss.

The modules are transformers' own under their own names; only the code that strings them together is here, because a
stage has no embedding or no head, a rank may hold a piece of the sequence, and the logits need never be whole.
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from autotune.modeling.build import checkpointed_layers
from autotune.spec.config import TrialConfig

IGNORED = -100
"""Label of a token without a next one."""
LOSS_CHUNKS = 8
"""Pieces of the sequence in which a chunked loss makes its logits."""


class VocabularyLoss(torch.nn.Module):
    """The output embedding, giving the summed loss instead of logits.

    Where its rows are shared by tensor-parallel ranks, so are the logits, and their softmax (`loss_parallel`).

    Args:
        weight: (vocabulary, hidden_size).
        chunks: pieces of the sequence whose logits are made one after another; more than one are recomputed in the
            backward pass.
    """

    def __init__(self, weight: torch.nn.Parameter, chunks: int) -> None:
        super().__init__()
        self.weight = weight
        self._chunks = chunks

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum () over tokens of the cross entropy.

        Args:
            hidden: (batch, sequence, hidden_size), of which each tensor-parallel rank may hold a share.
            labels: (batch, sequence), `IGNORED` where there is none.
        """
        if isinstance(hidden, DTensor):
            hidden = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        if self._chunks == 1:
            return self._loss(hidden, labels)
        pieces = zip(hidden.chunk(self._chunks, dim=1), labels.chunk(self._chunks, dim=1), strict=True)
        losses = [checkpoint(self._loss, *piece, use_reentrant=False) for piece in pieces]
        return torch.stack(losses).sum()

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.weight
        if not isinstance(weight, DTensor):
            logits = functional.linear(hidden, weight).flatten(0, 1).float()
            return functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        local = functional.linear(hidden, weight.to_local()).flatten(0, 1).float()
        shared = DTensor.from_local(local, weight.device_mesh, [Shard(1)])
        loss = functional.cross_entropy(shared, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        assert isinstance(loss, DTensor)
        return loss.to_local()


class DecoderStage(torch.nn.Module):
    """Some layers in a row of `model`, with the embedding if they are the first and the head if they are the last.

    Args:
        model: a decoder whose layers take (hidden states, position_ids, position_embeddings); what is not of the stage
            is taken out of it, in place.
        config: how many ranks share a sequence, and how the loss is computed.
        stage: index of the stage.
        stages: how many there are; layers are divided as evenly as they can be.
        sequence_rank: which piece of the sequence is this rank's.
        autocast: the dtype of matrix products; None for that of the parameters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrialConfig,
        *,
        stage: int = 0,
        stages: int = 1,
        sequence_rank: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._pieces, self._piece, self._autocast = config.sequence_parallel_size, sequence_rank, autocast
        body: Any = model.base_model
        layers = checkpointed_layers(model)
        mine = range(stage * len(layers) // stages, (stage + 1) * len(layers) // stages)
        body.layers = torch.nn.ModuleDict({str(index): layers[index] for index in mine})  # names keep their numbers
        if stage > 0:
            body.embed_tokens = None
        if stage == stages - 1:
            chunks = LOSS_CHUNKS if config.loss == "chunked" else 1
            model.set_output_embeddings(VocabularyLoss(model.get_output_embeddings().weight, chunks))
        else:
            body.norm = None
            model.set_output_embeddings(None)

    @property
    def embedding(self) -> torch.nn.Module | None:
        """Token ids to hidden states, on the first stage."""
        found: torch.nn.Module | None = self.model.base_model.embed_tokens
        return found

    @property
    def norm(self) -> torch.nn.Module | None:
        """The final norm, on the last stage."""
        found: torch.nn.Module | None = self.model.base_model.norm
        return found

    @property
    def head(self) -> VocabularyLoss | None:
        """Hidden states to the loss, on the last stage."""
        found: VocabularyLoss | None = self.model.get_output_embeddings()
        return found

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Hidden states for the next stage, or on the last one the loss (1,).

        Args:
            inputs: token ids (batch, sequence) of this rank's piece; on later stages what the one before returned.
            labels: (batch, sequence) of the same piece, shifted: the token after each.

        Returns:
            The loss is scaled so that its mean over the sequence-parallel ranks is the mean over the tokens.
        """
        device = inputs.device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            batch, length = labels.shape
            hidden = inputs if self.embedding is None else self.embedding(inputs)
            first = self._piece * length
            positions = torch.arange(first, first + length, device=inputs.device)[None]
            rotary = self.model.base_model.rotary_emb(hidden, positions)
            for layer in self.model.base_model.layers.values():
                # No mask: attention is causal, and sequences are whole.
                hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            if self.head is None or self.norm is None:
                return hidden
            total: torch.Tensor = self.head(self.norm(hidden), labels)
        tokens = batch * (length * self._pieces - 1)
        return torch.stack([total * self._pieces / tokens])


def shifted_labels(input_ids: torch.Tensor) -> torch.Tensor:
    """The token after each (batch, sequence), `IGNORED` after the last."""
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = IGNORED
    return labels
