r"""A tool call in a text: how it is found and run, and what the model reads of its result.

    text      I need the product. <python> print(6 * 7) </python>
    call      ("python", " print(6 * 7) ")                             next_call(text)
    result    \n<result>\n42\n</result>\n                            run_tool("python", ..)
"""
import re

from tools.sandbox import run_python

TAGS = ("</python>", "</search>")        # where a call ends
RESULT_CAP = 6000                        # characters of a tool's result


def next_call(text):
    """(tool, body) if `text` ends in <python> .. </python> or <search> .. </search>, else None."""
    end = re.search(r"</(python|search)>\s*$", text)
    _, opened, body = text[:end.start()].rpartition(f"<{end[1]}>") if end else ("", "", "")
    return (end[1], body) if opened else None


def run_tool(tool, body, search=None):
    """Run one call. Returns the text to insert, <result> .. </result>, which also tells errors."""
    if tool == "python":
        run = run_python(re.sub(r"^\s*```\w*\n|\n```\s*$", "", body).strip("\n"), timeout_s=10)
        result = run.stdout.rstrip()
        if run.status != "ok":
            result += f"\n[{run.status} after {run.seconds:.1f} s]\n{run.stderr.strip()[-2000:]}"
        result = result.strip("\n") or "(nothing was printed)"
    else:                                          # next_call knows no third tool
        try:
            result = search(body.strip()) if search else "web search is not available"
        except (RuntimeError, ValueError) as problem:
            result = f"web search failed: {problem}"
    # The model must not be able to close the result, or what follows would pass for its own words.
    result = re.sub(r"<\s*/\s*result\s*>", "[/result]", result, flags=re.IGNORECASE)
    if len(result) > RESULT_CAP:
        result = result[:RESULT_CAP - 6] + "\n[cut]"
    return f"\n<result>\n{result}\n</result>\n"
