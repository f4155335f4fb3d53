"""HTTP: SGLang's native API, OpenAI's and Anthropic's, over one `frontend.tokenizer_manager`.

`app.build_app` puts the routes together, `process` is the process that serves them. Nothing here
imports torch, the scheduler or the runner.
"""
