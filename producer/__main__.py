"""`python -m producer`: the backend's side from a shell."""

from producer.cli.app import app

if __name__ == "__main__":
    app(prog_name="python -m producer")
