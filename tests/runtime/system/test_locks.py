import threading
import time
from pathlib import Path

from runtime.system.locks import file_lock


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    inside, most, waited = 0, 0, []

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with file_lock(tmp_path / "a.lock", patience_s=60, waiting=lambda: waited.append(1)) as held:
                assert held
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert waited
    assert list(tmp_path.iterdir()) == []
    with file_lock(tmp_path / "nowhere" / "a.lock", patience_s=1) as held:
        assert not held
