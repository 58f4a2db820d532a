"""The policy model: transformer, key/value cache, tokenizer and chat renderer. jax and tokenizers only."""

from rome.models.cache import KVCache, extend, init_cache
from rome.models.chat import ChatRenderer, Message, ParsedChunk, Renderer, RenderError
from rome.models.config import ConfigError, ModelConfig, RopeScaling
from rome.models.induction import init_induction
from rome.models.kernels import KernelError
from rome.models.logprobs import TokenScores, score_tokens
from rome.models.params import ParamSpec, count_params, init_params, param_specs
from rome.models.pretrained_tokenizer import PretrainedTokenizer, load_tokenizer
from rome.models.template_renderer import TemplateRenderer
from rome.models.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerError, train_tokenizer
from rome.models.transformer import (
    SequenceScores,
    forward,
    hidden_states,
    score_sequences,
    token_log_probs,
    unstack_layers,
)

__all__ = [
    "SPECIAL_TOKENS",
    "ChatRenderer",
    "ConfigError",
    "KVCache",
    "KernelError",
    "Message",
    "ModelConfig",
    "ParamSpec",
    "ParsedChunk",
    "PretrainedTokenizer",
    "RenderError",
    "Renderer",
    "RopeScaling",
    "SequenceScores",
    "TemplateRenderer",
    "TokenScores",
    "Tokenizer",
    "TokenizerError",
    "count_params",
    "extend",
    "forward",
    "hidden_states",
    "init_cache",
    "init_induction",
    "init_params",
    "load_tokenizer",
    "param_specs",
    "score_sequences",
    "score_tokens",
    "token_log_probs",
    "train_tokenizer",
    "unstack_layers",
]
