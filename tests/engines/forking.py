"""Let SGLang's processes be copies of the one that starts an engine."""

import multiprocessing
import os


def fork_instead_of_spawning() -> None:
    """Keep SGLang from spawning: to import SGLang takes each of its three processes longer than most plans.

    They load plugins themselves, as spawned ones do. Servers, and the engine of two ranks in test_engines_agree.py,
    spawn theirs.
    """
    from sglang.srt import plugins

    def forget_plugins() -> None:
        plugins._plugins_loaded = False

    os.register_at_fork(after_in_child=forget_plugins)
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *_args, **_options: None
