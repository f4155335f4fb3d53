"""Between HTTP and the scheduler: text to ids, ids to text, and the one gate in between.

`validation.Gate` makes every `GenerateRequest`; `tokenizer_manager.TokenizerManager` is the way in
and out of the engine for the server and for the offline `Engine`. Nothing here imports torch, the
scheduler or the runner.
"""
