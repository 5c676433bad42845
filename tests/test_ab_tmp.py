import pytest
from playwright import sync_api
@pytest.fixture(scope="module")
def browser():
  with sync_api.sync_playwright() as play:
    b=play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
    yield b
    b.close()
def test_x(browser):
  browser.new_page()
