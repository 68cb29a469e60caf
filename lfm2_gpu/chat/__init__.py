"""Chats to prompts: the checkpoint's template in a box, and which text in the result is trusted.

Knows no tokenizer: a prompt is a list of ``(text, trusted)`` segments, which
`Tokenizer.encode_segments` turns into ids.
"""

from __future__ import annotations

from lfm2_gpu.chat.fallbacks import FALLBACK_TEMPLATES
from lfm2_gpu.chat.template import ChatTemplate

__all__ = ["FALLBACK_TEMPLATES", "ChatTemplate"]
