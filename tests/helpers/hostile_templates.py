"""Chat templates made to take all time or memory, or to print what differs by run."""

_LOOP = (
    "{% set ns = namespace(x=START) %}"
    "{% for i in range(TIMES) %}{% set ns.x = STEP %}{% endfor %}"
)


def _grow(start: str, step: str, end: str = "{{ ns.x | length }}", times: int = 60):
    loop = _LOOP.replace("START", start).replace("TIMES", str(times))
    return loop.replace("STEP", step) + end


_NESTED = _grow(
    "[1]", "[ns.x, ns.x]", ""
)  # a list whose text would be 2**60 characters
_LONG = "{% set s = 'a' * 10**8 %}"
_MACRO = (
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
)
_LOOPS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
)

# Each takes more than any limit, so each must be stopped.
ENDLESS = (
    # Comparisons and membership of nested and long values.
    _NESTED + _NESTED.replace("ns", "other") + "{{ ns.x == other.x }}",
    _NESTED + _NESTED.replace("ns", "other") + "{{ ns.x < other.x }}",
    _NESTED + _NESTED.replace("ns", "other") + "{{ ns.x in [other.x] }}",
    _NESTED + _NESTED.replace("ns", "other") + "{{ [other.x].index(ns.x) }}",
    _NESTED + _NESTED.replace("ns", "other") + "{{ [other.x].count(ns.x) }}",
    _NESTED + _NESTED.replace("ns", "other") + "{{ [other.x, ns.x] | max | length }}",
    _NESTED + _NESTED.replace("ns", "other") + "{{ [other.x, ns.x] | sort | length }}",
    _NESTED + "{{ ns.x | string | length }}",
    _NESTED + "{{ ns.x | tojson | length }}",
    _NESTED + "{{ ns.x ~ '' }}",
    _NESTED + "{{ '%r' % (ns.x,) }}",
    _NESTED + "{{ '{}'.format(ns.x) }}",
    _NESTED + "{{ ns.x | pprint }}",
    _NESTED + "{{ ns.x }}",
    _LOOPS.replace("BODY", "{{ '' if 'b' in ns else '' }}").replace(
        "{% for i", _LONG + "{% set ns = s %}{% for i", 1
    ),
    # Searches of long texts.
    _LONG + _LOOPS.replace("BODY", "{% set n = s.count('b') %}"),
    _LONG + _LOOPS.replace("BODY", "{% set n = s.find('b') %}"),
    _LONG + _LOOPS.replace("BODY", "{% set n = s.rfind('ba') %}"),
    _LONG + _LOOPS.replace("BODY", "{% set n = s.split('b') %}"),
    _LONG + _LOOPS.replace("BODY", "{% set n = s.startswith(s) %}"),
    _LONG + _LOOPS.replace("BODY", "{% set n = s == s[1:] ~ 'a' %}"),
    _LONG + _LOOPS.replace("BODY", "{% set n = s.lower() %}"),
    _LONG + _LOOPS.replace("BODY", "{% set n = s[::-1] %}"),
    _LONG + _LOOPS.replace("BODY", "{% set n = s[1:] %}"),
    _LONG + _LOOPS.replace("BODY", "{% set n = s.encode() %}"),
    _LONG + _LOOPS.replace("BODY", "{% set n = s in {} %}"),
    "{{ ('a' * 10**5).count('aa' * 10**4) }}" + _LOOPS.replace("BODY", "{{ '' }}"),
    # Lists that are kept, one for each step.
    _grow("[]", "ns.x + ['a' * 10**6 ~ i]", times=99999),
    _grow("[]", "ns.x + [(ns.x, i)]", times=99999),
    _grow("[]", "[ns.x, [0] * 10**6]", times=99999),
    _grow("''", "ns.x ~ 'a' * 10**6", times=99999),
    "{{ [[[1] * 1000] * 1000] * 1000 }}",
    "{{ ([0] * 10**9) | length }}",
    "{{ (('a',) * 10**10) | length }}",
    # Numbers.
    "{{ 2 ** (10**9) % 7 }}",
    _grow("3", "ns.x * ns.x", "{{ ns.x % 7 }}"),
    _grow("3", "ns.x + ns.x", "{{ ns.x % 7 }}", times=99999) * 50,
    _LOOPS.replace("BODY", "{% set n = (10**4000) | string %}"),
    _LOOPS.replace("BODY", "{% set n = ('9' * 4000) | int %}"),
    # Loops and recursion.
    _LOOPS,
    _LOOPS.replace("BODY", "{{ loop.cycle('a', 'b') }}"),
    _LOOPS.replace("BODY", "{% set x %}a{% endset %}"),
    "{% for i in range(99999) %}" * 12 + "x" + "{% endfor %}" * 12,
    _MACRO + "{{ f(60) }}",
    "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}" + _LOOPS,
    "{% set l = range(99999) | list %}{% for i in l %}{{ l | sort(reverse=i % 2) }}{% endfor %}",
    "{% set l = range(99999) | list %}{% for i in l %}{{ l | unique | list | length }}{% endfor %}",
    "{% set l = range(99999) | list %}{% for i in l %}{{ l | map('string') | join }}{% endfor %}",
    "{% for i in range(1000) %}{{ 'a' * 10**8 }}{% endfor %}",
    # Growing texts.
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (2 * 10**9, 1) }}",
    "{{ '{:>2000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 2 * 10**9) }}",
    "{{ '%2000000000d' | format(1) }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.ljust(10**10) | length }}",
    "{{ '7'.zfill(10**10) | length }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "{{ ('b' * 10**6).join('a' * 10**6) }}",
    "{{ ('a' * 10**6) | list | join('b' * 10**6) }}",
    "{{ ('\t' * 10**6).expandtabs(10**6) }}",
    "{{ ('\n' * 10**6) | indent(10**6, blank=true) }}",
    "{{ ('{0}' * 300000).format('a' * 10**6) }}",
    "{{ ('%s' * 30000) % (('a' * 10**6,) * 30000) }}",
    "{{ ('a' * 10**6) | list | map('replace', 'a', 'b' * 10**6) | list | length }}",
    "{{ ('a' * 10**6).translate({97: 'b' * 10**6}) }}",
    "{{ ('a ' * 10**7) | wordwrap(1) | length }}" + _LOOPS,
    "{{ (('<' * 10**5 + ' ') * 10) | striptags | length }}" + _LOOPS,
    "{{ ('http://' * 10**6) | urlize | length }}" + _LOOPS,
    *(
        _grow("'a' * 1000", step)
        for step in (
            "ns.x ~ ns.x",
            "ns.x + ns.x + ns.x",
            "ns.x.replace('a', 'aa')",
            "ns.x.join([ns.x, ns.x])",
            "'%s%s' % (ns.x, ns.x)",
            "'{0}{0}'.format(ns.x)",
            "(ns.x, ns.x) | join",
        )
    ),
    _grow("['a']", "[ns.x] + [ns.x] + [ns.x]", "{{ ns.x | string | length }}"),
    _grow("['a']", "ns.x + ns.x"),
    _grow("{1: 1}", "{1: ns.x, 2: ns.x}", "{{ ns.x | string | length }}"),
    _grow("'a'", "0", "").replace(
        "ns.x = 0 %}", "ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"
    ),
)

# Each breaks a rule of Python or the sandbox, or is so deep that it cannot be compiled.
BROKEN = (
    "{{ " + "9" * 5000 + " }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "[" * 500 + "]" * 500 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{{ " + "not " * 5000 + "1 }}",
    "{{ 1" + " + 1" * 20000 + " }}",
    "{{ a" + ".a" * 20000 + " }}",
    "{% if a %}" * 300 + "{% endif %}" * 300,
    "{% for i in [1] %}" * 30 + "x" + "{% endfor %}" * 30,
    "{{ 'a' * 10**30 }}",
    "{{ range(10**6) | list }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [[[[1]]]] recursive %}{{ loop([x]) }}{% endfor %}",
    "{% extends 'other' %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
)

# Each would print the address of a function, a method or an iterator.
ADDRESSES = (
    "{{ raise_exception }}",
    "{{ strftime_now }}",
    "{{ range }}",
    "{{ dict.fromkeys }}",
    "{{ messages.append }}",
    "{{ messages[0].items }}",
    "{{ messages[0]['items'] }}",
    "{{ messages[0] | attr('items') }}",
    "{{ ''.join }}",
    "{{ '{}'.format }}",
    "{{ [messages.index] }}",
    "{{ {'f': messages.index} }}",
    "{{ '%r' % messages.index }}",
    "{{ '%s' % messages.index }}",
    "{{ '{}'.format(messages.index) }}",
    "{{ messages.index ~ '' }}",
    "{{ messages.index | string | upper }}",
    "{{ [messages.index] | join }}",
    "{{ (messages.index | string)[-4] }}",
    "{{ namespace(f=messages.index) }}",
    "{{ messages | map('string') }}",
    "{{ messages | selectattr('content') | string }}",
    "{{ messages | batch(2) }}",
    "{{ messages | reverse }}",
    "{{ messages[0] | items }}",
    "{% for m in messages %}{{ loop.cycle | string | length }}{% endfor %}",
    "{% block b %}{% endblock %}{{ self.b }}",
    "{{ raise_exception(messages.append) }}",
)
