"""Finding and loading models, and the page without one."""

import runpy
import shutil
import sys

import pytest
from web_page import PAGE

from scripts.web.models import DemoTraining, default_model, find_lora, find_models
from scripts.web.texts import TEXTS
from scripts.web_demo import Args


def test_models_are_found_and_named(folder, tmp_path):
    (folder / "lora").mkdir(exist_ok=True)
    (folder / "lora" / "lora_identity_96.pth").touch()
    found = find_models(Args(save_dir=str(folder)))
    assert {each.label for each in found} == {"full_sft_96", "dpo_64", "moe/pretrain_64_moe"}
    assert default_model(found, Args(save_dir=str(folder))).label == "full_sft_96"
    moe = Args(save_dir=str(folder), weight="pretrain")
    assert default_model(found, moe).label == "moe/pretrain_64_moe"
    by_label = {each.label: each for each in found}
    assert [path.stem for path in find_lora(by_label["full_sft_96"])] == ["lora_identity_96"]
    assert find_lora(by_label["dpo_64"]) == []
    shutil.rmtree(folder / "lora")


def test_adapters_of_earlier_versions_lie_beside_their_weights(tmp_path):
    for name in ("full_sft_768", "lora_medical_768", "lora_medical_512", "full_sft_768_moe"):
        (tmp_path / f"{name}.pth").touch()
    found = {model.label: model for model in find_models(Args(save_dir=str(tmp_path)))}
    assert found.keys() == {"full_sft_768", "full_sft_768_moe"}
    assert [path.stem for path in find_lora(found["full_sft_768"])] == ["lora_medical_768"]
    assert find_lora(found["full_sft_768_moe"]) == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_without_a_model_the_page_says_how_to_get_one(open_page, tmp_path, monkeypatch, language):
    started = []
    monkeypatch.setattr(DemoTraining, "start", lambda self, *given: started.append(given))
    page = open_page("--language", language, save_dir=tmp_path)
    number = ["en", "zh"].index(language)
    assert page.title[0].value == TEXTS["no_model"][number]
    assert any(each.value == "make demo" for each in page.code)
    page.button[0].click().run()
    assert started == [(str(tmp_path), 12)]


def test_visitors_from_elsewhere_do_not_train_the_demo(open_page, tmp_path):
    elsewhere = dict(save_dir=tmp_path, address="192.0.2.7")
    assert not open_page(**elsewhere).button
    assert open_page("--remote_training", "1", **elsewhere).button


def test_a_damaged_model_is_one_sentence(open_page, tmp_path):
    (tmp_path / "full_sft_64.pth").write_bytes(b"nothing")
    page = open_page(save_dir=tmp_path)
    assert "is refused: it is not a plain state dict" in page.error[0].value


def test_a_wrong_flag_is_one_sentence(open_page, monkeypatch, capsys):
    assert "unknown argument --nonsense" in open_page("--nonsense").error[0].value
    monkeypatch.setattr(sys, "argv", [PAGE])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(PAGE, run_name="__main__")
    assert end.value.code == 2 and "streamlit run" in capsys.readouterr().err
