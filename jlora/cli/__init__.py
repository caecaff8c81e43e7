"""The command line: flags and YAML files in, typed settings or one clear message out.

Read in this order:
  flags.py          the flags of a command, taken from its dataclass
  flag_values.py    one value: read, checked against its type, described
  arguments.py      the words of a command line and a YAML file become the dataclass
  help_page.py      the answer to --help
  json_schema.py    the answer to --schema
  command.py        runs a command; every failure is one message and an exit status
  jlora_command.py  the `jlora` program, which finds the commands by name
  process_setup.py  settings of JAX and malloc that make every command faster
"""
