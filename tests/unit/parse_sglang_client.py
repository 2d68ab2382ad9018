"""Print what SGLang's own benchmark client makes of command lines: `python parse_sglang_client.py COMMANDS.json`.

A process of its own, because the client reads `sys.argv` and takes long to import.
"""

import json
import sys
from pathlib import Path

from sglang.benchmark import serving

parsed = []
serving.run_benchmark = lambda args: parsed.append(vars(args))
for arguments in json.loads(Path(sys.argv[1]).read_text()):
    sys.argv[1:] = arguments
    serving.cli_main()
sys.stdout.write(f"\n{json.dumps(parsed, default=str)}\n")
