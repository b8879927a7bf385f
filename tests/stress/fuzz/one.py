"""Fuzzes one target in this process: `python -m fuzz.one TARGET MUTATION [libFuzzer's options and folders]`.

It ends with a code that is not 0 at the first input that breaks a promise, after libFuzzer has saved that input.
"""

import sys

import atheris

# Their branches are what guides the fuzzer, so they are instrumented as they are first imported.
with atheris.instrument_imports(include=["dedup_service", "tomllib"]):
    from tests.stress.fuzz.mutants import MUTATIONS
    from tests.stress.fuzz.targets import TARGETS


def main() -> None:
    """Hand over to libFuzzer, which does not come back."""
    program, target, mutation, *options = sys.argv
    if mutation:
        MUTATIONS[mutation][1]()
    atheris.Setup([program, *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
