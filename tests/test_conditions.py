"""Looking at a device: what Linux tells, in folders made for the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk import conditions


def put(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_device_without_sensors_tells_little(tmp_path: Path) -> None:
    """Without battery, thermometer and meminfo these are unknown, not zero."""
    found = conditions.look(tmp_path / "sys", tmp_path / "proc")

    assert (found.battery, found.charging, found.celsius, found.free_mb) == (None, None, None, None)
    assert found.load is None or found.load >= 0


def test_sensors_are_read(tmp_path: Path) -> None:
    """The weakest battery, the hottest zone, and what could be had of memory."""
    put(
        tmp_path / "sys/power_supply",
        BAT0__capacity="80\n",
        BAT1__capacity="55\n",
        AC__online="0\n",
        BAT0__status="Discharging\n",
    )
    put(tmp_path / "sys/thermal", thermal_zone0__temp="41000\n", thermal_zone1__temp="67500\n", cooling_device0__cur_state="1\n")
    put(tmp_path / "proc", meminfo="MemTotal:  2048000 kB\nMemFree:  10 kB\nMemAvailable:  1024000 kB\n")
    found = conditions.look(tmp_path / "sys", tmp_path / "proc")

    assert (found.battery, found.charging, found.celsius, found.free_mb) == (0.55, False, 67.5, 1000.0)


@pytest.mark.parametrize(("file", "text"), [("AC__online", "1"), ("BAT0__status", "Charging"), ("BAT0__status", "Full")])
def test_a_charger_is_seen(tmp_path: Path, file: str, text: str) -> None:
    """A mains adapter that is online, or a battery that says so, is charging."""
    put(tmp_path / "power_supply", BAT0__capacity="5", **{file: text})

    assert conditions.look(tmp_path, tmp_path).charging is True


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    """Sensors that hold no number, no text, or nothing readable are as if they were not there."""
    put(tmp_path / "power_supply", BAT0__capacity="unknown", BAT1__capacity="")
    put(tmp_path / "thermal", thermal_zone1__temp="30000")
    (tmp_path / "thermal/thermal_zone0").mkdir()
    (tmp_path / "thermal/thermal_zone0/temp").write_bytes(b"\xff\xfe")
    (tmp_path / "thermal/thermal_zone2/temp").mkdir(parents=True)
    found = conditions.look(tmp_path, tmp_path)

    assert (found.battery, found.celsius) == (None, 30.0)


@pytest.mark.parametrize("text", ["", "MemAvailable:", "MemAvailable: lots kB", "MemFree: 2048 kB", "\n\n: :"])
def test_a_meminfo_without_the_number_tells_nothing(tmp_path: Path, text: str) -> None:
    """Whatever stands in the file, the memory is unknown then, and training is not ended by it."""
    put(tmp_path, meminfo=text)

    assert conditions.look(tmp_path, tmp_path).free_mb is None


def test_the_battery_of_a_mouse_is_not_the_device_s(tmp_path: Path) -> None:
    """A peripheral (scope `Device`) that is `online` is no charger, and its charge is nobody's business."""
    put(tmp_path / "power_supply", mouse__scope="Device", mouse__capacity="5", mouse__online="1", mouse__status="Full")
    assert conditions.look(tmp_path, tmp_path).battery is None

    put(tmp_path / "power_supply", BAT0__capacity="40", BAT0__status="Discharging", BAT0__scope="System", AC__online="0")
    found = conditions.look(tmp_path, tmp_path)
    assert (found.battery, found.charging) == (0.4, False)


def test_speed_is_a_positive_number_and_memory_can_be_trimmed() -> None:
    """Both work on any machine, and however busy it is, the speed is never 0, by which a choice would divide."""
    conditions.trim()

    assert 0 < conditions.gflops(1, 0.001) < 1e6
    assert conditions.gflops(1, 0.0, 1) > 0  # however late the first look at the clock
