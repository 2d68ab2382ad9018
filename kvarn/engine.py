"""What an engine's adapter was tested with, and what is said where something else is installed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import kvarn
from kvarn import env
from kvarn.errors import EngineIncompatible

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine, and its versions.

    Args:
        name: of the engine.
        package: what pip installs.
        tested: versions that KVarN was tested with.
        recommended: the one to install.
    """

    name: str
    package: str
    tested: tuple[str, ...]
    recommended: str

    def require_tested(self, version: str) -> None:
        """Refuse a version outside the table, unless any is accepted.

        Raises:
            EngineIncompatible: names the installed and the tested versions, and what to do.
        """
        if version.partition("+")[0] in self.tested:
            return
        if not env.allow_untested_engine():
            raise self.incompatible(
                f"{self.name} {version} is not among them.",
                "or set KVARN_ALLOW_UNTESTED_ENGINE=1 to accept any version whose signatures match",
            )
        logger.warning(
            "KVarN %s was not tested with %s %s; accepted on request.", kvarn.__version__, self.name, version
        )

    def require_alike(self, version: str, differences: Sequence[str]) -> None:
        """Refuse an engine that differs from what its adapter relies on.

        Args:
            version: installed.
            differences: `signature_differences` and the like, as phrases.

        Raises:
            EngineIncompatible: names the versions, what differs, and what to do.
        """
        if differences:
            listed = "; ".join(differences)
            raise self.incompatible(f"This {self.name} {version} differs from them: {listed}.", "or a newer KVarN")

    def incompatible(self, what: str, otherwise: str) -> EngineIncompatible:
        """Return the error that says what is wrong.

        Args:
            what: is wrong, a sentence.
            otherwise: what a user may do instead of installing a tested version; goes on with that sentence.
        """
        return EngineIncompatible(
            f"KVarN {kvarn.__version__} is tested with {self.name} {' and '.join(self.tested)}. {what} "
            f"Install a tested version (pip install {self.package}=={self.recommended}), {otherwise}."
        )
