"""Why a model is not pruned: transformers' causal language models without a row in `pruning.families`, by the reason."""

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

EXPERTS = "a mixture of experts, whose MLPs are not one block for each layer"
RECURRENT = "it has state-space, convolution or linear-attention layers, which have no KV groups"
LATENT = "its attention is latent (MLA): all heads share one compressed key and value"
ENCODER = "an encoder, which predicts hidden words and not the next one"
ENCODER_DECODER = "an encoder-decoder: its decoder reads more than its own text"
MULTIMODAL = "it reads pictures or sound too: only pure text decoders are pruned"
SLOPES = "ALiBi gives every head a slope by its place, so no head can leave"
HEADLESS = "transformers has no causal language model of this type"

_TYPES = {
    EXPERTS: """afmoe aria_text axk1 axk2 beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1 dots3_note
        dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoe_swa
        granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2_text inkling_text jetmoe kolibri1 laguna llama4 llama4_text longcat_flash
        mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral olmoe phimoe qwen2_moe qwen3_moe solar_open zaya""",
    RECURRENT: """bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 mamba mamba2 nemotron_h
        olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv xlstm zamba
        zamba2""",
    LATENT: "minicpm3 youtu",
    ENCODER: """bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer rembert roberta
        roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod""",
    ENCODER_DECODER: """bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody mvp pegasus plbart prophetnet
        trocr whisper""",
    MULTIMODAL: """cohere_compass_text emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified gemma4_unified_assistant git got_ocr2 mllama moshi
        moss_transcribe_diarize phi4_multimodal""",
    SLOPES: "bloom mpt",
    "its norms before the output projections run over all heads and neurons, which change with each that leaves": "bitnet",
    "it subtracts heads from one another, so that they leave in pairs across the layer only": "diffllama",
    "its layers share keys and values or differ in the size of heads": "gemma3n_text gemma4_text gemma4_unified_text gemma4_assistant",
    "its attention sinks are one number for each head, outside the projections": "granite_swa",
    "each layer weights its residual stream": "doge",
    "its layers are run many times over": "hrm_text",
    "it reads bytes through models of its own": "blt",
    "its norms follow the residual sum, so a block cannot leave with its norm": "openai-gpt",
    "its fused projection is cut into four pieces first and into heads then": "codegen",
    "its attention adds a bias outside of the projection": "gpt_neox_japanese",
    "where its heads and norms lie depends on the variant (Falcon 3 is of the type 'llama')": "falcon",
    "its attention is called with queries, keys and values apart": "ctrl",
    "its projections lie one module deeper than a decoder layer's blocks": "cpmant gpt_neo",
    "transformers' class gives its head where its decoder is asked for": "modernbert-decoder",
    "it has no row yet, but a package can add one (docs/families.md)": "persimmon",
}
REASONS = {name: reason for reason, names in _TYPES.items() for name in names.split()}


def refusal(config: PretrainedConfig) -> str | None:
    """Why no model with this config is pruned, the end of a sentence; None where nothing is known against it."""
    if config.is_encoder_decoder:
        return ENCODER_DECODER
    if config.model_type in REASONS:
        return REASONS[config.model_type]
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return HEADLESS
    if any("expert" in name for name in config.to_dict()):
        return EXPERTS
    return None
