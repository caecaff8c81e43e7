"""Text from a loaded model, for people and for programs.

Read `completions` first: prompts to texts, with stop strings and figures of speed.
`prompt_files` reads and writes the files of many prompts, `chat_session` talks to a person.
`slots` is the batch of a server, with an adapter for each row (`adapter_rows`);
`openai_server` answers requests, which `openai_requests` checks. `held_out` compares answers
with references, and `sampler` answers a few prompts for a run in training.
`scoring` says how likely texts are, for `lm_harness`.
"""
