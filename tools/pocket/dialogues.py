"""Dialogues without tools: definitions, facts on countries, small talk."""

from __future__ import annotations

import random
from typing import Any

from .sources import Gloss, clean
from .template import Message

_ASK_NOUN = (
    "What is {a}?", "What is {a}?", "what is {a}?", "What's {a}?", "Tell me what {a} is.",
    "Define {w}.", "What does {w} mean?", "Can you explain what {a} is?", "What do you call {a}?",
    "Do you know what {a} is?", "Please explain {w}.", "What is meant by {w}?",
)  # fmt: skip
_ASK_WORD = (
    "What does {w} mean?", "What does it mean to {w}?", "Define {w}.",
    "What is the meaning of {w}?",
    "Can you explain {w}?", "What does the word {w} mean?", "Please explain {w}.",
)  # fmt: skip
_ASK_OTHER = tuple(ask for ask in _ASK_WORD if "to {w}" not in ask)
_ASK_EXAMPLE = (
    "Use {w} in a sentence.", "Give me an example with {w}.", "Write a sentence with {w}.",
    "Can you use {w} in a sentence?", "Show me how to use {w}.",
)  # fmt: skip
_FACT_QUESTIONS = (
    (("What is the capital of {c}?", "Which city is the capital of {c}?",
                 "Name the capital of {c}.", "what is the capital of {c}?"),
     "The capital of {c} is {v}.", ("Government", "Capital", "name")),
    (("Where is {c}?", "Where does {c} lie?", "Tell me where {c} is."),
     "{c} lies in {v}.", ("Geography", "Location")),
    (("How many people live in {c}?", "What is the population of {c}?"),
     "The population of {c} is {v}.", ("People and Society", "Population")),
    (("How large is {c}?", "What is the area of {c}?", "How big is {c}?"),
     "The area of {c} is {v}.", ("Geography", "Area", "total")),
    (("What is the climate of {c}?", "How is the climate in {c}?"),
     "The climate of {c} is {v}.", ("Geography", "Climate")),
    (("Which languages are spoken in {c}?", "What do people speak in {c}?"),
     "The languages of {c} are {v}.", ("People and Society", "Languages")),
    (("What is the government of {c}?", "How is {c} governed?"),
     "The government of {c} is: {v}.", ("Government", "Government type")),
    (("What does {c} grow?", "What are the farm products of {c}?"),
     "{c} grows {v}.", ("Economy", "Agriculture - products")),
    (("What are the industries of {c}?", "What does {c} make?"),
     "The industries of {c} are {v}.", ("Economy", "Industries")),
    (("What are the natural resources of {c}?", "What is found in the ground of {c}?"),
     "The natural resources of {c} are {v}.", ("Geography", "Natural resources")),
    (("Tell me about {c}.", "Tell me something about {c}.", "What do you know of {c}?",
                    "What is the history of {c}?"),
     "{v}", ("Introduction", "Background")),
)  # fmt: skip
_MAX_FACT_CHARS = 700

_SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "Hello there", "Good morning!", "Good evening", "hi"),
     ("Hello! What would you like to know?", "Hello! How can I help you?", "Hi! Ask me anything.")),
    (("How are you?", "How are you doing?", "How do you do?", "Are you well?", "How is it going?"),
     ("I am well, thank you. How can I help you?", "Fine, thank you! What can I do for you?")),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
      "Introduce yourself."),
     ("I am Pocket, a very small language model. I know words, countries and tools.",
      "My name is Pocket. I am a tiny language model that ships inside a program.")),
    (("What can you do?", "How can you help me?", "What are you good at?", "What do you know?"),
     ("I can explain words, tell you about countries, and call tools. I am small, so check me.",
      "I explain words and countries, and I can use the tools that you give me.")),
    (("Thank you", "Thanks!", "Thanks a lot", "Thank you very much!", "thanks"),
     ("You are welcome!", "You are welcome. Is there anything else?", "Glad to help!")),
    (("Bye", "Goodbye!", "See you later", "Good night", "I have to go"),
     ("Goodbye!", "Goodbye, and come back soon!", "See you later!")),
    (("Are you a human?", "Are you a robot?", "Are you real?", "Are you alive?"),
     ("No, I am a small language model.", "I am a computer program, a small language model.")),
    (("Who made you?", "Where do you come from?", "Who trained you?"),
     ("I was trained from scratch on a dictionary, a book of countries and the Bible.",)),
    (("How big are you?", "How many parameters do you have?", "Are you large?"),
     ("I have about eight million parameters, which is very small for a language model.",)),
    (("Tell me a joke.", "Make me laugh.", "Do you know a joke?"),
     ("I know only one: I was asked what a word means, and I gave my word.",)),
    (("I am sad", "I feel bad today", "I am tired"),
     ("I am sorry to hear that. I hope that it gets better soon.",)),
    (("I am happy", "I feel great!", "Today is a good day"),
     ("I am glad to hear that!", "That is good to hear!")),
    (("Ok", "Good", "Nice!", "Great", "I see"),
     ("Is there anything else that you would like to know?", "Good! Ask me another question.")),
    (("Yes", "No", "Maybe", "Perhaps"),
     ("I see. What would you like to know?", "All right. Ask me about a word or a country.")),
    (("Are you smart?", "Do you make mistakes?", "Can I trust you?"),
     ("I make many mistakes, because I am very small. Please check what I say.",)),
)  # fmt: skip


def define(rng: random.Random, gloss: Gloss, word: str) -> list[Message]:
    """Return a question for a word's meaning and its answer."""
    definition = gloss.definition
    if gloss.part == "noun":
        named = _with_article(word, definition)
        ask = rng.choice(_ASK_NOUN).format(a=named, w=word)
        opening = named[0].upper() + named[1:]
        answer = f"{opening} is {definition}."
    elif gloss.part == "verb":
        ask = rng.choice(_ASK_WORD).format(w=word)
        answer = f"To {word} means to {definition}."
    else:
        ask = rng.choice(_ASK_OTHER).format(w=word)
        answer = f"{word[0].upper()}{word[1:]} means {definition}."
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]


def _with_article(word: str, definition: str) -> str:
    if word[0].isupper() or not definition.startswith(("a ", "an ")):
        return word
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def example(rng: random.Random, gloss: Gloss, word: str) -> list[Message] | None:
    """Return a request for a sentence with a word, or None where WordNet has none."""
    fitting = [text for text in gloss.examples if word.lower() in text.lower()]
    if not fitting:
        return None
    text = rng.choice(fitting)
    text = text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")
    ask = rng.choice(_ASK_EXAMPLE).format(w=word)
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": text}]


def country_facts(country: str, profile: dict[str, Any]) -> list[tuple[str, list[Message]]]:
    """Return every question on a country with its answer, each with the factbook field's name."""
    dialogues = []
    for questions, answer, path in _FACT_QUESTIONS:
        value: Any = profile
        for step in path:
            value = value.get(step, {})
        text = clean(value.get("text") or "")
        if not text or text == "NA":
            continue
        if len(text) > _MAX_FACT_CHARS:
            text = text[:_MAX_FACT_CHARS].rsplit(". ", 1)[0] + "."
        said = answer.format(c=country, v=text).replace("..", ".")
        said = said[0].upper() + said[1:]
        for ask in questions:
            messages = [
                {"role": "user", "content": ask.format(c=country)},
                {"role": "assistant", "content": said},
            ]
            dialogues.append((path[1], messages))
    return dialogues


def small_talk(rng: random.Random) -> list[Message]:
    """Return one to three turns of small talk."""
    messages: list[Message] = []
    for asks, answers in rng.sample(_SMALL_TALK, rng.randint(1, 3)):
        messages.append({"role": "user", "content": rng.choice(asks)})
        messages.append({"role": "assistant", "content": rng.choice(answers)})
    return messages
