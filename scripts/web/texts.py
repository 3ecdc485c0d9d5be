"""The texts of the web page in English and Chinese."""

# ruff: noqa: E501

LANGUAGES = {"en": "English", "zh": "中文"}

TEXTS = {
    # -- all pages
    "chat": ("Chat", "对话"),
    "microscope": ("Microscope", "显微镜"),
    "model": ("Model", "模型"),
    "lora": ("LoRA adapter", "LoRA 适配器"),
    "none": ("none", "无"),
    "about": (
        "{millions:.2f}M parameters, {layers} layers, {device}",
        "{millions:.2f}M 参数，{layers} 层，{device}",
    ),
    "loading": ("Loading the model …", "正在加载模型……"),
    "cannot_load": ("This model cannot be loaded:", "无法加载该模型："),
    # -- without a model
    "no_model": ("There is no model yet", "还没有模型"),
    "no_model_where": (
        "No weights were found in `{folder}`. There are three ways to get a model:",
        "在 `{folder}` 中没有找到权重。有三种方式获得模型：",
    ),
    "way_demo": (
        "**Train the demo model** (3M parameters) from scratch on the data that comes with this project: "
        "in the terminal, or with the button below.",
        "**训练演示模型**（300 万参数）：用项目自带的数据从零训练。可以在终端运行，也可以点击下面的按钮。",
    ),
    "way_own": (
        "**Train your own model**, as README.md describes:",
        "**训练自己的模型**，步骤见 README_zh.md：",
    ),
    "way_folder": (
        "**Download a transformers model**, such as MiniMind2, into a folder and load it:",
        "**下载一个 transformers 格式的模型**（例如 MiniMind2）到本地文件夹并加载：",
    ),
    "minutes": (
        "Training time in minutes (12 give a good model)",
        "训练时间（分钟；12 分钟效果较好）",
    ),
    "train": ("Train the demo model now", "开始训练演示模型"),
    "training": (
        "Training the demo model: {elapsed} of {minutes} minutes",
        "正在训练演示模型：{elapsed} / {minutes} 分钟",
    ),
    "stop_training": ("Stop training", "停止训练"),
    "training_failed": (
        "Training ended without a model. The end of its log:",
        "训练失败，没有得到模型。日志末尾：",
    ),
    # -- chat
    "message_placeholder": ("Your message", "输入消息"),
    "text_placeholder": ("A text to continue", "输入一段文字，由模型续写"),
    "welcome": ("What would you like to talk about?", "想聊点什么？"),
    "base_model": (
        "This model is only pretrained: it continues your text instead of answering.",
        "该模型只做过预训练：它会续写你的文字，而不是回答。",
    ),
    "stop": ("Stop", "停止"),
    "regenerate": ("Regenerate", "重新生成"),
    "new_chat": ("New chat", "新对话"),
    "save": ("Save", "保存"),
    "inspect": ("Inspect in the microscope", "用显微镜查看"),
    "look_inside": ("Or look inside the model", "或者查看模型内部"),
    "none_chosen": ("none chosen", "未选择"),
    "thinking": ("Thinking …", "思考中……"),
    "reasoning": ("Reasoning", "思考过程"),
    "step": ("Step {step}: {name}", "第 {step} 步：{name}"),
    "invalid_call": ("invalid tool call", "无效的工具调用"),
    "arguments": ("arguments", "调用参数"),
    "result": ("result", "返回结果"),
    "speed": (
        "{tokens} tokens, {rate:.0f} tokens/s, first token after {first:.2f} s",
        "{tokens} 个 token，{rate:.0f} token/s，首个 token 延迟 {first:.2f} 秒",
    ),
    "stopped": ("stopped", "已停止"),
    "length_reached": ("maximum length reached", "已达到最大生成长度"),
    "tool_limit_reached": ("tool-call limit reached", "已达到工具调用次数上限"),
    "too_long": (
        "The conversation has {tokens} tokens, and at most {room} fit. Shorten it, or start a new chat.",
        "对话共 {tokens} 个 token，最多容纳 {room} 个。请缩短内容，或开始新对话。",
    ),
    "queue_full": ("The queue is full; please try again.", "排队已满，请稍后再试。"),
    "failed": ("The model failed: {error}", "模型出错：{error}"),
    "tools": ("Tools", "工具"),
    "tools_help": (
        "Tools that the model may call. This needs a model trained on tool calls.",
        "模型可以调用的工具。需要用工具调用数据训练过的模型。",
    ),
    "open_thinking": ("Think before answering", "先思考再回答"),
    "open_thinking_help": (
        "Starts the answer with <think>. This needs a model trained on reasoning data.",
        "回答以 <think> 开头。需要用推理数据训练过的模型。",
    ),
    "sampling": ("Sampling", "采样"),
    "temperature": ("Temperature (0: greedy)", "温度（0：贪心解码）"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k (0: all)", "Top-k（0：不限）"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "max_new_tokens": ("Maximum new tokens", "最大生成长度（token）"),
    "seed": ("Seed (empty: random)", "随机种子（留空：随机）"),
    "context": ("Context", "上下文"),
    "historys": ("Number of earlier messages", "历史消息条数"),
    "system": ("System message", "系统消息"),
    # -- microscope
    "microscope_about": (
        "What the model computes for a text, token by token.",
        "逐个 token 查看模型对一段文字的计算。",
    ),
    "source": ("Source", "来源"),
    "source_text": ("a text", "一段文字"),
    "source_chat": ("the chat", "当前对话"),
    "text": ("Text", "文字"),
    "example": (
        "The Transformer reads all tokens at once. Attention lets each token look at the earlier ones.",
        "Transformer 同时读入所有 token。注意力让每个 token 看到前面的 token。",
    ),
    "truncated": (
        "Only the first {maximum} of {tokens} tokens are shown.",
        "只显示 {tokens} 个 token 中的前 {maximum} 个。",
    ),
    "n_tokens": ("tokens", "token 数"),
    "n_bytes": ("bytes per token", "每 token 字节数"),
    "mean_loss": ("mean loss (nats)", "平均损失（nat）"),
    "bpb": ("bits per byte", "每字节比特数"),
    "perplexity": ("perplexity", "困惑度"),
    "view": ("View", "视图"),
    "tokens": ("Tokens", "分词"),
    "next": ("Next token", "下一个 token"),
    "attention": ("Attention", "注意力"),
    "lens": ("Logit lens", "Logit lens"),
    "experts": ("Experts", "专家"),
    "loss": ("Loss", "损失"),
    "tokens_about": (
        "The text as the tokenizer splits it, with the id and the bytes of each token. A Chinese character or an emoji "
        "has several bytes, and may be several tokens.",
        "分词器切分后的文字，以及每个 token 的 id 和字节。一个汉字或表情有多个字节，也可能是多个 token。",
    ),
    "next_about": (
        "At each position the model predicts a probability for every token of the vocabulary to come next.",
        "在每个位置，模型为词表中的每个 token 预测它是下一个 token 的概率。",
    ),
    "position": ("Position", "位置"),
    "next_after": (
        "Most likely next tokens after {token}:",
        "{token} 之后最可能的 token：",
    ),
    "actual_next": (
        "Actual next token: {token}, rank {rank}, probability {probability:.2%}.",
        "实际的下一个 token：{token}，排名第 {rank}，概率 {probability:.2%}。",
    ),
    "all_positions": (
        "All positions: darker means more likely. A frame marks the actual next token.",
        "所有位置：颜色越深概率越高；边框标出实际的下一个 token。",
    ),
    "token": ("token", "token"),
    "probability": ("probability", "概率"),
    "attention_about": (
        "Each row is a query token; the colours are its attention weights over the earlier tokens and itself. Each row sums to 1.",
        "每一行是一个查询 (query) token，颜色是它对自己及之前各 token 的注意力权重。每行之和为 1。",
    ),
    "no_attention": (
        "This model does not return attention weights.",
        "该模型不返回注意力权重。",
    ),
    "layer": ("Layer", "层"),
    "head": ("Head", "头"),
    "mean_head": ("mean of all", "所有头的平均"),
    "attends_to": ("Attention weights of {token} in this head:", "{token} 在这个头的注意力权重："),
    "query": ("query", "查询 (query)"),
    "key": ("key", "键 (key)"),
    "weight": ("weight", "权重"),
    "all_heads": ("All heads of this layer", "该层的所有头"),
    "lens_about": (
        "What the model would predict if it ended after each layer: the final norm and the LM head are applied to every "
        "layer's hidden states. Read a column upwards to see a prediction form. Hover over a cell for more tokens.",
        "如果模型在某一层之后结束，它会预测什么：对每一层的隐藏状态应用最后的归一化和输出头。从下往上看一列，可以看到预测如何形成。悬停可查看更多 token。",
    ),
    "embedding": ("embedding", "嵌入"),
    "experts_about": (
        "Which experts the router chose for each token in each layer, and with what weight. Each expert has a colour.",
        "每一层的路由为每个 token 选择了哪些专家、权重多少。每个专家一种颜色。",
    ),
    "dense": (
        "This model is dense and has no experts: every token uses the whole feed-forward layer. Train a MoE model with --use_moe 1.",
        "这是稠密模型，没有专家：每个 token 都使用整个前馈层。用 --use_moe 1 可以训练 MoE 模型。",
    ),
    "load_about": (
        "Expert load: the share of token assignments that each expert received.",
        "专家负载：每个专家分到的 token 比例。",
    ),
    "expert": ("expert", "专家"),
    "share": ("share", "比例"),
    "loss_about": (
        "Cross-entropy of each token: −log of the probability that the model predicted for it. Training minimises its mean.",
        "每个 token 的交叉熵：模型预测它的概率的 −log。训练使其平均值最小。",
    ),
    "loss_axis": ("loss (nats)", "损失（nat）"),
    "lens_unknown": (
        "The logit lens does not know the final norm of this architecture.",
        "Logit lens 不支持该模型结构：找不到最后的归一化层。",
    ),
    # -- training
    "training_page": ("Training", "训练"),
    "runs": ("Runs", "训练记录"),
    "new_training": ("New training", "新建训练"),
    "no_runs": (
        "There are no runs in {folders} yet. Start one under *New training*, or in the terminal: it appears here.",
        "{folders} 中还没有训练记录。可以在「新建训练」中开始，也可以在终端启动，它会出现在这里。",
    ),
    "more_runs": ("Show all {count} runs", "显示全部 {count} 个训练"),
    "choose_runs": (
        "Tick one run, or several to lay them over each other.",
        "勾选一个训练；勾选多个可叠加比较。",
    ),
    "running": ("running", "训练中"),
    "stopped_run": ("stopped", "已停止"),
    "finished": ("finished", "已完成"),
    "died": ("died", "异常退出"),
    "died_silently": (
        "The process ended without a word: it was killed, or the machine went down. *Continue* goes on from the last checkpoint.",
        "进程没有留下信息就结束了：可能被终止，或机器断电。「继续训练」会从最近的检查点继续。",
    ),
    "steps_of": ("step {step:,} of {total:,}", "第 {step:,} / {total:,} 步"),
    "step_at": ("step {step:,}", "第 {step:,} 步"),
    "time_left": ("{time} left", "剩余 {time}"),
    "seconds_short": ("{n:.0f} s", "{n:.0f} 秒"),
    "minutes_short": ("{n:.0f} min", "{n:.0f} 分钟"),
    "hours_short": ("{n:.1f} h", "{n:.1f} 小时"),
    "x_axis": ("Over", "横轴"),
    "axis_num_tokens": ("tokens", "token 数"),
    "axis_step": ("steps", "步数"),
    "axis_minutes": ("minutes", "分钟"),
    "all_curves": ("All curves", "所有曲线"),
    "no_curves": ("The log has no curve yet.", "日志中还没有曲线。"),
    "curve_loss": ("training loss", "训练损失"),
    "curve_eval_bpb": ("held-out text", "验证集"),
    "curve_reward": ("reward", "奖励"),
    "curve_eval_reward": ("reward, held-out prompts", "奖励（验证集）"),
    "curve_kl": ("KL to the reference", "与参考模型的 KL"),
    "curve_learning_rate": ("learning rate", "学习率"),
    "curve_grad_norm": ("gradient norm before clipping", "裁剪前的梯度范数"),
    "curve_tokens_per_second": ("speed", "速度"),
    "curve_memory_gb": ("memory", "内存"),
    "curve_mfu": ("share of the machine's peak (MFU)", "算力利用率 (MFU)"),
    "unit_nats": ("nats", "nat"),
    "unit_bits per byte": ("bits per byte", "每字节比特数"),
    "unit_tokens per second": ("tokens per second", "token/秒"),
    "unit_GB": ("GB", "GB"),
    "samples": ("Samples", "样例"),
    "output": ("Output", "输出"),
    "command": ("Command line", "命令行"),
    "report": ("Report", "报告"),
    "reports": ("Reports", "报告"),
    "no_samples": (
        "No samples yet: the run writes one at each evaluation (--eval_interval).",
        "还没有样例：每次评估时写入一条（--eval_interval）。",
    ),
    "no_output": (
        "What this run prints is in the terminal in which it was started.",
        "该训练在终端中启动，输出在那个终端里。",
    ),
    "no_command": (
        "It is not known by which command this run was started.",
        "不知道该训练由哪条命令启动。",
    ),
    "stop_run": ("Stop", "停止"),
    "stopping": (
        "It stops after this step and saves its checkpoint …",
        "本步完成后停止并保存检查点……",
    ),
    "continue_run": ("Continue", "继续训练"),
    "cannot_continue": (
        "Only a trainer that was started as a command of its own, by one process, can be continued here.",
        "这里只能继续由单个进程、以独立命令启动的训练。",
    ),
    "other_machine": ("It runs on {host}.", "它在 {host} 上运行。"),
    "start_failed": ("{name} ended before its first step:", "{name} 在第一步之前就结束了："),
    "start_pending": ("{name} is starting …", "{name} 正在启动……"),
    "dismiss": ("Dismiss", "关闭"),
    "read_only": (
        "Trainings are started and stopped from the machine that serves this page. `--remote_training 1` allows it to every visitor.",
        "只能在提供本页面的机器上启动和停止训练。`--remote_training 1` 允许所有访问者操作。",
    ),
    # -- the form
    "loading_trainers": ("Loading the trainers …", "正在加载训练脚本……"),
    "stage": ("Stage", "阶段"),
    "flag_data_path": ("Data", "数据"),
    "flag_from_weight": ("Weights to start from", "初始权重"),
    "flag_hidden_size": ("Width", "隐藏层宽度"),
    "flag_num_hidden_layers": ("Layers", "层数"),
    "flag_minutes": ("Minutes", "时长（分钟）"),
    "flag_max_steps": ("Steps", "步数"),
    "flag_learning_rate": ("Learning rate", "学习率"),
    "flag_save_weight": ("Name of the run", "训练名称"),
    "other_flags": ("Other flags", "其他参数"),
    "all_flags": ("All flags of this stage", "该阶段的全部参数"),
    "default": ("default: {value}", "默认：{value}"),
    "automatic": ("automatic", "自动"),
    "default_data": (
        "the stage's file in dataset/; or choose, or type a path",
        "默认为 dataset/ 中该阶段的文件；也可选择或输入路径",
    ),
    "choose_or_type": ("choose, or type a path", "选择，或输入路径"),
    "start": ("Start", "开始训练"),
    "run": ("run", "训练"),
}


class Translator:
    """Texts in one language: t("chat"), t("speed", tokens=3, …)."""

    def __init__(self, language: str):
        self.index = list(LANGUAGES).index(language)

    def __call__(self, name: str, /, **values: object) -> str:
        return TEXTS[name][self.index].format(**values)
