"""Makes a checkpoint take longer contexts by YaRN: `longer.py MODEL OUT FACTOR` links its files beside a new config."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Run the command line."""
    model, out, factor = Path(sys.argv[1]).resolve(), Path(sys.argv[2]), float(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        link = out / path.name
        if path.name != "config.json" and not link.exists():
            link.symlink_to(path)
    config = json.loads((model / "config.json").read_text())
    trained = config["max_position_embeddings"]
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    config["rope_parameters"] = {"rope_theta": config["rope_parameters"]["rope_theta"], **yarn}
    config["max_position_embeddings"] = int(trained * factor)
    (out / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main()
