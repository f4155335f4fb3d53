"""HTTP: SGLang's native API and OpenAI's, over one `frontend.tokenizer_manager`.

`app.build_app` puts the routes together, `process` is the process that serves them. Nothing here
imports torch, the scheduler or the runner.
"""
