"""Fuzzes one target in this process: `python -m tests.stress.fuzz.one TARGET MUTATION [libFuzzer options and folders]`.

MUTATION may be empty. At the first input that breaks a promise, libFuzzer saves it and the exit code is not 0.
"""

import sys

import atheris

# The fuzzer is guided by the branches of these modules, which are instrumented on their first import.
with atheris.instrument_imports(include=["dedup_service", "tomllib"]):
    from tests.stress.fuzz.mutants import MUTATIONS
    from tests.stress.fuzz.targets import TARGETS


def main() -> None:
    """Run libFuzzer, which does not return."""
    program, target, mutation, *options = sys.argv
    if mutation:
        MUTATIONS[mutation][1]()
    atheris.Setup([program, *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
