#!/usr/bin/env python3
"""Checks notebooks as they are committed: executed, in order, without errors, small, and the same on every machine.

    check_notebooks.py FILE.ipynb ...           one line for each problem on stdout; exit status 1 when there is one
    check_notebooks.py --tidy FILE.ipynb ...    strips what differs between machines and cannot be a result (metadata of
                                                cells, the version of Python, messages on stderr), then checks

Of each notebook is demanded: the kernel is "python3"; code cells are numbered 1, 2, .. as one run from the top numbers
them; no output is an error or went to stderr; no output is larger than LARGEST and the file no larger than LARGEST_FILE
bytes; nothing in it is an absolute path of some machine. A notebook is JSON: cells with a source, and outputs. Standard
library only.
"""
import json
import re
import sys

LARGEST = 200_000
LARGEST_FILE = 700_000
# Where people keep their files, and where temporary ones are. An address (https://..) is none of them.
PATH = re.compile(r"(?<![\w.:/~])/(home|root|tmp|work|usr|opt|mnt|var|Users|private)/[\w.-]+")


def text_of(value):
    return "".join(value) if isinstance(value, list) else value


def texts(output):
    """Every text in an output; pictures are left out."""
    if "text" in output:
        yield text_of(output["text"])
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/") or kind == "image/svg+xml":
            yield text_of(value)
    yield from output.get("traceback", [])


def problems(notebook, size):
    if notebook.get("metadata", {}).get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3"
    if size > LARGEST_FILE:
        yield f"the file has {size} bytes, {LARGEST_FILE} are allowed: draw smaller or fewer figures"
    code = [cell for cell in notebook.get("cells", []) if cell.get("cell_type") == "code"]
    if not code:
        yield "there are no code cells"
    for number, cell in enumerate(code, 1):
        where = f"code cell {number}"
        if cell.get("execution_count") != number:
            yield f"{where} is numbered {cell.get('execution_count')}: execute all cells from the top (make notebooks)"
        if cell.get("metadata"):
            yield f"{where} has metadata: run check_notebooks.py --tidy"
        found = PATH.search(text_of(cell.get("source", "")))
        if found:
            yield f"{where} names {found[0]}, a path of one machine"
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                yield f"{where} ended with {output.get('ename')}: {output.get('evalue', '')[:80]}"
            if output.get("name") == "stderr":
                yield f"{where} wrote to stderr: {text_of(output.get('text', ''))[:80]!r}"
            length = len(json.dumps(output))
            if length > LARGEST:
                yield f"{where} has an output of {length} bytes, {LARGEST} are allowed"
            for text in texts(output):
                found = PATH.search(text)
                if found:
                    yield f"{where} printed {found[0]}, a path of one machine"
    if set(notebook.get("metadata", {}).get("language_info", {})) - {"name"}:
        yield "it names a version of Python: run check_notebooks.py --tidy"


def tidy(notebook):
    notebook["metadata"] = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                            "language_info": {"name": "python"}}
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]


def main(arguments):
    clean = arguments[:1] == ["--tidy"]
    files = arguments[1:] if clean else arguments
    if not files:
        sys.exit(__doc__)
    found = 0
    for path in files:
        try:
            with open(path, encoding="utf-8") as file:
                notebook = json.load(file)
        except (OSError, ValueError) as error:
            print(f"{path}: cannot be read as a notebook: {error}")
            found += 1
            continue
        if clean:
            tidy(notebook)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(notebook, file, indent=1, ensure_ascii=False, sort_keys=True)
                file.write("\n")
        with open(path, "rb") as file:
            size = len(file.read())
        for problem in problems(notebook, size):
            print(f"{path}: {problem}")
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
