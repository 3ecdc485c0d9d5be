"""What the web page says, in two languages."""

# ruff: noqa: E501

LANGUAGES = {"en": "English", "zh": "中文"}

TEXTS = {
    # -- both pages
    "chat": ("Chat", "对话"),
    "microscope": ("Microscope", "显微镜"),
    "model": ("Model", "模型"),
    "lora": ("LoRA addition", "LoRA 附加权重"),
    "none": ("none", "无"),
    "about": (
        "{millions:.2f}M parameters, {layers} layers, {device}",
        "{millions:.2f}M 参数，{layers} 层，{device}",
    ),
    "loading": ("Loading the model …", "正在加载模型……"),
    "cannot_load": ("This model cannot be loaded:", "无法加载这个模型："),
    # -- without a model
    "no_model": ("There is no model yet", "还没有模型"),
    "no_model_where": (
        "No weights were found in `{folder}`. There are three ways to get some:",
        "在 `{folder}` 中没有找到权重。有三种办法：",
    ),
    "way_demo": (
        "**Train the demo model**, 3M parameters, from nothing on data that comes with this project: "
        "in the terminal, or with the button below.",
        "**训练演示模型**：300 万参数，用项目自带的数据从零开始。可以在终端运行，也可以点下面的按钮。",
    ),
    "way_own": (
        "**Train your own**, as README.md says:",
        "**训练自己的模型**，步骤见 README_zh.md：",
    ),
    "way_folder": (
        "**Download a model** of transformers into a folder, such as MiniMind2, and name it:",
        "**下载一个** transformers 格式的模型（例如 MiniMind2）到本地文件夹，然后指定它：",
    ),
    "minutes": ("Minutes (12 make a good one)", "训练时间（分钟；12 分钟效果较好）"),
    "train": ("Train the demo model now", "现在训练演示模型"),
    "training": (
        "Training the demo model: {spent} of {minutes} minutes",
        "正在训练演示模型：{spent} / {minutes} 分钟",
    ),
    "stop_training": ("Stop the training", "停止训练"),
    "training_failed": (
        "The training ended without a model. Its last words:",
        "训练没有得到模型。最后的输出：",
    ),
    # -- chat
    "say": ("Your message", "输入消息"),
    "go_on": ("A text to go on with", "输入一段文字，让模型续写"),
    "hello": ("What shall we talk about?", "想聊点什么？"),
    "continues": (
        "This model is only pretrained: it does not answer, it goes on with your text.",
        "这个模型只做过预训练：它不会回答，只会续写你的文字。",
    ),
    "stop": ("Stop", "停止"),
    "again": ("Again", "重新回答"),
    "new": ("New chat", "新对话"),
    "save": ("Save", "保存"),
    "look": ("Under the microscope", "放到显微镜下"),
    "look_inside": ("Or look inside the model", "或者看看模型内部"),
    "choose": ("none chosen", "未选择"),
    "thinking": ("Thinking …", "思考中……"),
    "thoughts": ("Thoughts", "思考过程"),
    "step": ("Step {step}: {name}", "第 {step} 步：{name}"),
    "unreadable_call": ("a call that cannot be read", "无法解析的调用"),
    "called_with": ("called with", "调用参数"),
    "result": ("result", "返回结果"),
    "speed": (
        "{tokens} tokens, {rate:.0f} tokens/s, the first after {first:.2f} s",
        "{tokens} 个 token，{rate:.0f} token/s，首个 token {first:.2f} 秒",
    ),
    "stopped": ("stopped", "已停止"),
    "full": ("longest answer reached", "已达到最大长度"),
    "rounds": ("no more tools in this turn", "本轮不再调用工具"),
    "too_long": (
        "That is {tokens} tokens, and there is room for {room}. Say it shorter, or begin a new chat.",
        "共 {tokens} 个 token，只放得下 {room} 个。请缩短内容，或开始新对话。",
    ),
    "busy": ("Too many people are waiting; try again.", "排队的人太多，请稍后再试。"),
    "failed": ("The model failed: {error}", "模型出错：{error}"),
    "tools": ("Tools", "工具"),
    "tools_help": (
        "The model is told of these and may call them. Only a model that was trained on tool calls knows how.",
        "模型会知道这些工具并可以调用。只有用工具调用数据训练过的模型才会用。",
    ),
    "think": ("Think first", "先思考"),
    "think_help": (
        "Only a model that was trained on thoughts knows how.",
        "只有用思考数据训练过的模型才会。",
    ),
    "sampling": ("Sampling", "采样"),
    "temperature": ("Temperature (0: the likeliest token)", "温度（0：总选最可能的）"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k (0: all)", "Top-k（0：不限）"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "max_new_tokens": ("Longest answer, tokens", "最多生成 token 数"),
    "seed": ("Seed (empty: by chance)", "随机种子（留空：随机）"),
    "context": ("What it sees", "上下文"),
    "memory": ("Earlier messages it sees", "能看到的历史消息数"),
    "system": ("System message", "系统消息"),
    # -- microscope
    "microscope_about": (
        "What a model does with a text, token by token.",
        "逐个 token 地看模型如何处理一段文字。",
    ),
    "source": ("Look at", "观察"),
    "source_text": ("a text", "一段文字"),
    "source_chat": ("the chat", "当前对话"),
    "text": ("Text", "文字"),
    "example": (
        "The Transformer reads all tokens at once. Attention lets each token look at the earlier ones.",
        "Transformer 同时读入所有 token。注意力让每个 token 看到前面的 token。",
    ),
    "cut": (
        "Only the first {most} of {tokens} tokens are shown.",
        "只显示 {tokens} 个 token 中的前 {most} 个。",
    ),
    "n_tokens": ("tokens", "token 数"),
    "n_bytes": ("bytes per token", "每 token 字节数"),
    "mean_loss": ("mean loss (nats)", "平均损失（nat）"),
    "bpb": ("bits per byte", "每字节比特数"),
    "perplexity": ("perplexity", "困惑度"),
    "view": ("View", "视图"),
    "tokens": ("Tokens", "分词"),
    "next": ("Next token", "下一个"),
    "attention": ("Attention", "注意力"),
    "lens": ("Logit lens", "Logit lens"),
    "experts": ("Experts", "专家"),
    "loss": ("Loss", "损失"),
    "tokens_about": (
        "The text as the model reads it. Under each token its id and its bytes: a Chinese character or an emoji is "
        "several bytes, and may be several tokens.",
        "模型读到的文字。每个 token 下面是它的 id 和字节：一个汉字或表情是多个字节，也可能是多个 token。",
    ),
    "next_about": (
        "At each place the model gives every token of its vocabulary a probability of coming next.",
        "在每个位置，模型都为词表中的每个 token 给出“下一个就是它”的概率。",
    ),
    "place": ("Place", "位置"),
    "behind": (
        "Behind {token}, the likeliest next tokens:",
        "在 {token} 之后，最可能的下一个 token：",
    ),
    "came": (
        "{token} came, which is number {rank}, with {probability:.2%}.",
        "实际是 {token}，排第 {rank}，概率 {probability:.2%}。",
    ),
    "all_places": (
        "All places: the darker, the likelier. A frame marks the token that really came.",
        "所有位置：颜色越深越可能；边框标出实际出现的 token。",
    ),
    "token": ("token", "token"),
    "probability": ("probability", "概率"),
    "attention_about": (
        "Each row is a token that looks back; the colours say how it shares out its attention over the tokens so far. "
        "Each row adds up to 1.",
        "每一行是一个往回看的 token，颜色表示它把注意力分给之前哪些 token。每行之和为 1。",
    ),
    "no_attention": ("This model does not tell its attention.", "这个模型不提供注意力权重。"),
    "layer": ("Layer", "层"),
    "head": ("Head", "头"),
    "mean_head": ("mean of all", "所有头平均"),
    "looks_at": ("What {token} looks at, in this head:", "在这个头里，{token} 看向："),
    "from": ("from", "从"),
    "to": ("to", "到"),
    "weight": ("weight", "权重"),
    "all_heads": ("All heads of this layer", "这一层的所有头"),
    "lens_about": (
        "What the model would say if it ended behind each layer: the final norm and the head are put behind every layer. "
        "Read a column upwards to see an answer form. Hover over a cell for more.",
        "如果模型在某一层之后就结束，它会说什么：把最后的归一化和输出头接到每一层后面。从下往上看一列，可以看到答案如何形成。悬停可看更多。",
    ),
    "embedding": ("embedding", "嵌入"),
    "experts_about": (
        "Which experts each token went to in each layer, and with what weight. Each expert has a colour.",
        "每一层里，每个 token 去了哪些专家、权重多少。每个专家一种颜色。",
    ),
    "dense": (
        "This model has no experts: every token uses the whole feed-forward layer. Train one with --use_moe 1.",
        "这个模型没有专家：每个 token 都用整个前馈层。用 --use_moe 1 可以训练一个 MoE 模型。",
    ),
    "load_about": ("The share of the choices that each expert had:", "每个专家被选中的比例："),
    "expert": ("expert", "专家"),
    "share": ("share", "比例"),
    "loss_about": (
        "How surprised the model is by each token: −log of the probability it gave. Training makes this small.",
        "模型对每个 token 的惊讶程度：它给出的概率的 −log。训练就是让它变小。",
    ),
    "loss_axis": ("loss (nats)", "损失（nat）"),
    "lens_unknown": (
        "This model has no final norm under a known name.",
        "找不到这个模型最后的归一化层。",
    ),
}


class Words:
    """The texts of one language: words("chat"), words("speed", tokens=3, …)."""

    def __init__(self, language: str):
        self.language = language
        self.number = list(LANGUAGES).index(language)

    def __call__(self, name: str, /, **values: object) -> str:
        return TEXTS[name][self.number].format(**values)
