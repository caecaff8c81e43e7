"""Text from a loaded model, for people and for programs.

Read `completions` first: prompts to texts, with stop strings and figures of speed.
`prompt_files` reads and writes the files of many prompts, `chat_session` talks to a person.
"""
