import threading

from depthmill.pipeline.store.files import write_atomically

"""Files on a local disk: whole or absent, however many write them."""


def test_many_may_write_one_file(tmp_path):
    path = tmp_path / "a" / "b" / "zarr.json"
    errors = []

    def write(content):
        try:
            for _ in range(100):
                write_atomically(path, content)
        except OSError as error:
            errors.append(error)

    contents = [bytes([number]) * 1000 for number in range(8)]
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_bytes() in contents
    assert list(path.parent.iterdir()) == [path], "no unfinished write is left, nor a folder for them"
