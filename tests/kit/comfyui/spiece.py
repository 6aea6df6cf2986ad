"""Small sentencepiece models, and their token lists as llama.cpp writes them into a GGUF file."""

import io

import sentencepiece

# Numbers of llama.cpp's types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TURN = "<start_of_turn>"  # of a chat template


def train(kind):
    """Make a sentencepiece model of a few hundred pieces. kind: 'unigram', as UMT5's, or 'bpe', as Gemma's."""
    sentences = [f"the quick brown fox jumps over the lazy dog {n} times, said a cat in a hat" for n in range(300)]
    out = io.BytesIO()
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 3, "bos_id": 2} if kind == "bpe" else {"unk_id": 2, "bos_id": -1}
    if kind == "unigram":
        special |= {"pad_id": 0, "eos_id": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=out,
        vocab_size=320,
        model_type=kind,
        byte_fallback=True,
        user_defined_symbols=[TURN, "\u2581\u2581"] if kind == "bpe" else [],
        normalization_rule_name="nmt_nfkc" if kind == "unigram" else "identity",
        add_dummy_prefix=kind == "unigram",
        remove_extra_whitespaces=kind == "unigram",
        minloglevel=2,
        **special,
    )
    return out.getvalue()


def metadata(raw, kind, rows):
    """Return what llama.cpp writes of a sentencepiece model, for a table of so many rows."""
    model = sentencepiece.SentencePieceProcessor(model_proto=raw)
    tokens = [f"[PAD{number}]" for number in range(rows)]
    scores, types = [-10000.0] * rows, [UNUSED] * rows
    asked = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_unused, UNUSED), (model.is_byte, BYTE))
    for number in range(model.get_piece_size()):
        tokens[number], scores[number] = model.id_to_piece(number), model.get_score(number)
        types[number] = next((found for ask, found in asked if ask(number)), NORMAL)
    if kind == "bpe":  # from the encoder's list of added tokens
        for piece, stored, found in ((TURN, TURN, CONTROL), ("\u2581\u2581", "  ", USER_DEFINED)):
            number = model.piece_to_id(piece)
            tokens[number], scores[number], types[number] = stored, -1000.0, found
    ids = {"unknown": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id(), "padding": model.pad_id()}
    found = {
        "tokenizer.ggml.model": "t5" if kind == "unigram" else "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": kind == "unigram",
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number >= 0},
    }
    if kind == "unigram":
        found |= {"tokenizer.ggml.remove_extra_whitespaces": True}
        found |= {"tokenizer.ggml.precompiled_charsmap": _part(_part(raw, 3), 2)}
    return found


def _part(raw, wanted):
    """Return the last text in a message of protobuf under that number."""
    at, found = 0, b""

    def varint():
        nonlocal at
        number = shift = 0
        while True:
            number |= (raw[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if raw[at - 1] < 0x80:
                return number

    while at < len(raw):
        key = varint()
        size = varint() if key & 7 in (0, 2) else 4
        if key & 7 == 2:
            found = raw[at : at + size] if key >> 3 == wanted else found
        if key & 7:
            at += size
    return found
